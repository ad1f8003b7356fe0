"""Stage ``finetune``: conversations, and a model that goes on from another one to follow them."""
