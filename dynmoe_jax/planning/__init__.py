"""What a program will do on hardware that is not there, read from what the compiler made of it."""
