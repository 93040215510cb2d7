"""Instruction tuning's data: tasks as templates, conversations, and the public releases' own files."""
