"""All that grades: the checks, the reference read from the masters, building a release, and grading submissions."""
