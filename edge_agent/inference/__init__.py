"""Answers, and what is learnt from the labels that come after them."""
