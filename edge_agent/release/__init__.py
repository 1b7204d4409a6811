"""From a release to a model that serves: fetched, checked, proved, watched, taken back."""
