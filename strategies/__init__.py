"""Strategies: one method, one file. The core reaches them by entry point only."""
