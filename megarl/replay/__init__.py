"""Routing replay: the layout of routes, and the context that records or
replays them. Works on router objects handed to it.
"""
