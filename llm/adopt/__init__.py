"""Stage ``adopt``: what was made elsewhere, sealed as an artifact from which a recipe can begin."""
