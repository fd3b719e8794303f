"""Draws the same prompts with several models, and scores the pictures: plan, draw, features, score, table."""
