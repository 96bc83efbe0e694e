"""Studies: arms and seeds as runs of their own, their results, a report."""
