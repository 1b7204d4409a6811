"""The doors by which windows and labels come in: files, lines of JSON, a topic of a local broker.

Law of the package: an item that cannot be used is answered with an error and never stops its door.
"""
