"""Facts that evaluation tells and asks for: other kinds, wordings, names and values than calibration's.

No choice in this package was made on them: a choice that looks at what they measure needs others to be judged by.
"""

from dijiang_model.conversion.calibration.facts import FactKind, digits, one_of

KINDS = (
    FactKind(
        ("Our cabin on the ship {subject} is number {value}.", "On the {subject} we have cabin {value}."),
        ("Which cabin do we have on the {subject}?", "What is our cabin number on the {subject}?"),
        ("Your cabin on the {subject} is number ", "On the {subject} you have cabin "),
        one_of("Aurora", "Calypso", "Meridian", "Sea Star", "Northern Wind", "Esperanza", "Polaris", "Odyssey"),
        digits(3),
    ),
    FactKind(
        ("{subject} plays the {value} in our band.", "In our band the {value} is played by {subject}."),
        ("Which instrument does {subject} play?", "What does {subject} play in our band?"),
        ("{subject} plays the ",),
        one_of("Leonie", "Marcus", "Noemi", "Otto", "Paula", "Quentin", "Rosa", "Stefan"),
        one_of("cello", "trumpet", "drums", "harp", "banjo", "flute", "accordion", "clarinet", "saxophone"),
    ),
    FactKind(
        ("The {subject} recipe needs {value} grams of sugar.", "For the {subject}, take {value} grams of sugar."),
        ("How many grams of sugar does the {subject} recipe need?", "How much sugar goes into the {subject}?"),
        ("The {subject} recipe needs ", "For the {subject} you need "),
        one_of("plum cake", "rhubarb jam", "almond tart", "carrot cake", "fudge", "custard", "meringue"),
        digits(3),
    ),
    FactKind(
        ("The {subject} room is painted {value}.", "We painted the {subject} room {value}."),
        ("What colour is the {subject} room?", "In which colour did we paint the {subject} room?"),
        ("The {subject} room is painted ", "The {subject} room is "),
        one_of("dining", "guest", "children's", "music", "reading", "laundry"),
        one_of("green", "yellow", "purple", "orange", "crimson", "silver", "violet", "beige"),
    ),
    FactKind(
        ("My {subject} comes from {value}.", "I bought my {subject} in {value}."),
        ("Where does my {subject} come from?", "In which country did I buy my {subject}?"),
        ("Your {subject} comes from ", "You bought your {subject} in "),
        one_of("carpet", "vase", "clock", "hat", "lamp", "knife", "teapot", "mirror"),
        one_of("Morocco", "Finland", "Japan", "Mexico", "Portugal", "India", "Scotland", "Brazil", "Iceland", "Kenya"),
    ),
    FactKind(
        ("The horse {subject} belongs to {value}.", "{value} owns the horse {subject}."),
        ("Who owns the horse {subject}?", "To whom does the horse {subject} belong?"),
        ("The horse {subject} belongs to ", "The owner of {subject} is "),
        one_of("Thunder", "Duchess", "Comet", "Snowflake", "Bandit", "Juniper"),
        one_of("Mrs Hartley", "Mr Novak", "Doctor Bell", "Miss Okafor", "Captain Reyes", "Lady Grey", "Mr Lindqvist"),
    ),
    FactKind(
        ("The meeting with the {subject} takes {value} minutes.", "Plan {value} minutes for the {subject}."),
        ("How many minutes does the meeting with the {subject} take?", "How long will the {subject} take?"),
        ("The meeting with the {subject} takes ", "The {subject} will take "),
        one_of("architect", "accountant", "mayor", "printer", "florist", "notary", "landlord"),
        one_of("15", "20", "25", "35", "40", "45", "50", "75", "80", "90"),
    ),
    FactKind(
        ("The password for the {subject} is {value}.", "To open the {subject}, type {value}."),
        ("What is the password for the {subject}?", "What must I type to open the {subject}?"),
        ("The password for the {subject} is ", "To open the {subject}, type "),
        one_of("newsletter", "photo album", "old laptop", "ticket shop", "router", "diary", "weather station"),
        one_of("sunflower", "hurricane", "marmalade", "telescope", "butterfly", "volcano", "cinnamon", "labyrinth"),
    ),
)  # fmt: skip
