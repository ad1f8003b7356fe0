"""Ladders of trainings, the law of loss that they show, and forecasts by it with their record."""
