"""`spd explore`: a text's slices on a screen, to switch off and see what the model says then."""
