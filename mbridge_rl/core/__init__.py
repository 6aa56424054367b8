"""What correspondence is made of: layouts, mapping rules, segments, plans, digests, and every error that this library raises.
Imports torch and nothing else of ours; no tensor is moved here.
"""
