"""Scenarios: streams of experiences. The only folder that imports Avalanche; the core reaches it by entry point."""
