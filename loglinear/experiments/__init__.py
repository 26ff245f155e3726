"""The evidence for or against adaptive decay: tasks, many small runs at once, and what they say."""
