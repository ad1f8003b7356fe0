"""The align stage: a model and preferences to a model that answers as people prefer."""
