"""Layouts, mapping rules, segments, plans and digests, and every error that this library raises.

Everything here is pure: no tensor is moved between processes and no file is read. This folder imports torch, numpy and numba,
and no other folder of this library.
"""
