"""From what a class hands in to marks and a report."""
