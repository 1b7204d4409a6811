"""Folding many updates into one: the mathematics between a screened update and a strategy. Imports torch."""
