"""`mpipipe doctor`: says what would go wrong before the job is lost. Collect, judge, report."""
