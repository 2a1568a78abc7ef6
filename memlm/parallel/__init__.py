"""Placing a model on several ranks: value tables split over memory groups, the rest by FSDP2."""
