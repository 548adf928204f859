"""Exam questions with answers: read, put into prompts, graded; what RL trains on and evaluation asks."""
