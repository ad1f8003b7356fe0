"""Tasks and texts that a model is scored on: prompts are rendered, then sequences are scored, then scores summed up."""
