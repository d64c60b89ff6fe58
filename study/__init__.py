"""The paper's baselines and ablations: methods, runs, measures, tables."""
