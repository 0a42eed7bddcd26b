"""Tools: functions that a model may call, their schemas, the check of a call's arguments, files of functions."""
