"""Hugging Face checkpoints to Megatron's layout and back."""
