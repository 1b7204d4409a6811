"""Refinement of an aggregate on the operator's own labelled data, before it becomes a head. Imports torch."""
