"""Where learners and estimators are compared: worlds of vectors, logs of text, populations, hard cases."""
