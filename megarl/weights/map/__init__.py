"""The one source of truth: for every parameter of every family its names, how they
relate, and which axis each dimension splits.
"""
