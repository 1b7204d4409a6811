"""The audit chain beyond SQL: what makes it good, who signs it, who else keeps its heads, what it says of a model."""
