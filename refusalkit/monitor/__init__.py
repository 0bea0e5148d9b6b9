"""Make a detector of harmful prompts from a finished run, and score prompts with it as they come."""
