"""Load: thousands of light agents on real connections against one broker and one aggregator."""
