"""Operations that make another model of one or of several."""
