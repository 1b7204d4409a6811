"""Mutated models: signed by those who hold the keys, and wrong in every way that a seed can make up."""
