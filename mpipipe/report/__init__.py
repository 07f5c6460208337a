"""`mpipipe report`: records of experiments, or one run, as tables, plots and sentences."""
