"""A copy of everything that an aggregator cannot be without, and how it comes back to life from one."""
