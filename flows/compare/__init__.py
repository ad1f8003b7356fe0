"""Runs side by side: what differs in their settings, data and metrics, and whether a model or a recipe is better."""
