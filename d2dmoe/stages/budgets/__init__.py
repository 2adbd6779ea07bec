"""Budgets: from goals to thresholds, and how they are shared out among the layers."""
