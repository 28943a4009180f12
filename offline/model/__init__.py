"""Running a model one layer at a time, and the text that it writes itself."""
