"""The interface for people and their scripts: who may use it, what they see, what they may do."""
