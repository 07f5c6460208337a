"""The report's page as a browser sees it: needs matplotlib and Chromium."""
