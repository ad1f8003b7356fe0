"""Laws of loss by parameters and tokens: which models to train for them, how they are fitted, and what they foresee."""
