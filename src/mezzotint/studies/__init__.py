"""Studies: many runs of recipes, their figures in one table, beside the paper's."""
