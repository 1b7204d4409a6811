"""The aggregator: registry, enrolment, rounds, releases, API. Imports wire, process and models only."""
