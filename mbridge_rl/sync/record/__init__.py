"""Records of syncs: spans of time, the report of one sync, the sinks that reports go to, and the page that shows them.
Imports `core` only.
"""
