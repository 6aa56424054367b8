"""What happened in a sync: `timeline` has spans of time, `report` the report of one sync, `sinks` the places that reports go
to, and `timeline_page` the page that shows them. This folder imports `core` and `distributed`.
"""
