"""Scores from responses: item response theory, anchors, estimators with standard errors, and schedules."""
