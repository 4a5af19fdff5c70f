"""A real language model as a target: its prompts, its answers, drafts of it and their rivals."""
