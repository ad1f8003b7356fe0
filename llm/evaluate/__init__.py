"""Stage ``evaluate``: how well the model predicts held-out documents."""
