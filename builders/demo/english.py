"""English: the demo world's words, question phrasings and answers."""

from __future__ import annotations

from builders.demo.language import Language


def _noun(colour: str | None, kind: str | None, plural: bool) -> str:
    word = (kind or "shape") + ("s" if plural else "")
    return f"{colour} {word}" if colour else word


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _listing(things: list[tuple[str, str]]) -> str:
    parts = [f"{_with_article(noun)} {place}" for noun, place in things]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _counted(count: int, singular: str, plural: str) -> str:
    return f"{count} {singular if count == 1 else plural}"


QUESTIONS: dict[str, tuple[str, ...]] = {
    "describe": (
        "Describe the picture.", "What do you see?", "What is in the picture?", "What does the picture show?",
        "Describe what you see.", "Tell me what is in this picture.", "What shapes are there?", "What is this?",
        "List all the shapes in the picture.", "What do you see in this picture?", "Describe this picture, please.",
    ),
    "describe_nth": ("What is{pic}?", "What do you see{pic}?", "What shapes are there{pic}?", "Describe what is{pic}.",
                     "List the shapes{pic}."),
    "count": ("How many {many} are there{pic}?", "How many {many} do you see{pic}?", "Count the {many}{pic}.",
              "What is the number of {many}{pic}?"),
    "count_more": ("And {many}?", "And how many {many}?", "What about {many}?"),
    "count_total": ("How many shapes are there in total{pic}?", "How many are there in total{pic}?",
                    "How many shapes altogether{pic}?"),
    "colour_of": ("What colour is the {the}{pic}?", "Which colour is the {the}{pic}?",
                  "What is the colour of the {the}{pic}?", "Tell me the colour of the {the}{pic}."),
    "and_the": ("And the {the}?", "What about the {the}?", "And what about the {the}?"),
    "colour_at": ("What colour is the shape {at}{pic}?", "Which colour is the shape {at}{pic}?",
                  "What is the colour of the shape {at}{pic}?"),
    "shape_at": ("What shape is {at}{pic}?", "Which shape is {at}{pic}?", "What is the shape {at}{pic}?"),
    "what_at": ("What is {at}{pic}?", "What do you see {at}{pic}?", "What can be found {at}{pic}?"),
    "and_at": ("And {at}?", "What about {at}?", "And what is {at}?"),
    "shape_of": ("What shape is the {c} one{pic}?", "Which shape is {c}{pic}?", "What is the {c} shape{pic}?"),
    "where": ("Where is the {the}{pic}?", "Where do you see the {the}{pic}?", "In which place is the {the}{pic}?"),
    "what_colour": ("What colour is it?", "Which colour is it?", "What colour does it have?"),
    "what_shape": ("What shape is it?", "Which shape is it?", "What shape does it have?"),
    "where_is_it": ("Where is it?", "And where is it?"),
    "what_else": ("What else is there{pic}?", "Is there anything else{pic}?", "Anything else{pic}?"),
    "largest": ("Which shape is the largest{pic}?", "What is the biggest shape{pic}?", "Which is the largest{pic}?"),
    "smallest": ("Which shape is the smallest{pic}?", "What is the smallest shape{pic}?",
                 "Which is the smallest{pic}?"),
    "which_larger": ("Which is larger{pic}, the {the} or the {other}?",
                     "Which one is bigger{pic}, the {the} or the {other}?"),
    "which_smaller": ("Which is smaller{pic}, the {the} or the {other}?",
                      "Which one is smaller{pic}, the {the} or the {other}?"),
    "is_left": ("Is the {the} to the left of the {other}{pic}?", "Is the {the} left of the {other}{pic}?"),
    "is_right": ("Is the {the} to the right of the {other}{pic}?", "Is the {the} right of the {other}{pic}?"),
    "is_above": ("Is the {the} above the {other}{pic}?", "Is the {the} higher than the {other}{pic}?"),
    "is_below": ("Is the {the} below the {other}{pic}?", "Is the {the} under the {other}{pic}?"),
    "is_larger": ("Is the {the} larger than the {other}{pic}?", "Is the {the} bigger than the {other}{pic}?"),
    "is_smaller": ("Is the {the} smaller than the {other}{pic}?",),
    "exist": ("Is there {a}{pic}?", "Do you see {a}{pic}?", "Can you see {a}{pic}?", "Are there any {many}{pic}?"),
    "and_exist": ("And {a}?", "What about {a}?"),
    "is_at": ("Is the {the} {at}{pic}?",),
    "is_colour": ("Is the {the} {c}{pic}?",),
    "same_colour": ("Are the {the} and the {other} the same colour{pic}?",
                    "Do the {the} and the {other} have the same colour{pic}?"),
    "more": ("Are there more {many} than {others}{pic}?", "Do you see more {many} than {others}{pic}?"),
    "which_more": ("Which picture has more {many}?", "In which picture are there more {many}?",
                   "Which of the two pictures has more {many}?"),
    "both": ("Do both pictures contain {a}?", "Is there {a} in both pictures?", "Do both pictures have {a}?"),
    "sum": ("How many {many} are there in both pictures together?",
            "How many {many} do the two pictures have in total?",
            "Count the {many} in both pictures."),
}  # fmt: skip

ANSWERS: dict[str, str] = {
    "describe_one": "The picture shows {list}.",
    "describe": "The picture shows {n} shapes: {list}.",
    "count": "There are {counted}.",
    "count_one": "There is {counted}.",
    "count_none": "There are no {many}.",
    "absent": "There is no {the}.",
    "empty": "There is nothing {at}.",
    "colour_of": "The {the} is {c}.",
    "it_is_colour": "It is {c}.",
    "it_is_shape": "It is {a}.",
    "a_thing": "{A}.",
    "shape_of": "The {c} one is {a}.",
    "where": "The {the} is {at}.",
    "it_is_at": "It is {at}.",
    "else": "There is also {list}.",
    "no_else": "There is nothing else.",
    "largest": "The largest shape is the {the}.",
    "smallest": "The smallest shape is the {the}.",
    "which_larger": "The {the} is larger.",
    "which_smaller": "The {the} is smaller.",
    "yes_left": "Yes, it is to the left.",
    "yes_right": "Yes, it is to the right.",
    "yes_above": "Yes, it is above.",
    "yes_below": "Yes, it is below.",
    "yes_larger": "Yes, it is larger.",
    "yes_smaller": "Yes, it is smaller.",
    "no_left": "No, it is to the right.",
    "no_right": "No, it is to the left.",
    "no_above": "No, it is below.",
    "no_below": "No, it is above.",
    "no_larger": "No, it is smaller.",
    "no_smaller": "No, it is larger.",
    "exist": "Yes, there are {counted}.",
    "exist_one": "Yes, there is {a}.",
    "exist_none": "No, there is no {the}.",
    "yes_at": "Yes, it is {at}.",
    "no_at": "No, it is {at}.",
    "yes_colour": "Yes, it is {c}.",
    "no_colour": "No, it is {c}.",
    "same_colour": "Yes, both are {c}.",
    "other_colour": "No, the {the} is {c} and the {other} is {d}.",
    "more_yes": "Yes, there are more {many}: {counted} and {counted2}.",
    "more_no": "No, there are not more {many}: {counted} and {counted2}.",
    "more_first": "The first picture has more {many}: {n} against {m}.",
    "more_second": "The second picture has more {many}: {m} against {n}.",
    "more_same": "Both pictures have the same number of {many}: {n}.",
    "both_yes": "Yes, both pictures have {a}.",
    "both_first": "No, only the first picture has {a}.",
    "both_second": "No, only the second picture has {a}.",
    "both_none": "No, neither picture has {a}.",
    "sum": "There are {n} in the first and {m} in the second picture, {total} in total.",
    "no_picture": "Please show me a picture.",
}

SMALL_TALK: dict[str, tuple[tuple[str, ...], str]] = {
    "hello": (("Hello", "Hello!", "Hi", "Hi there!", "Hey", "Good morning!", "Good evening.", "Hello, demo!"),
              "Hello! Show me a picture and ask me about it."),
    "how_are_you": (("How are you?", "How are you today?", "Are you well?"), "I am fine, thank you. How can I help?"),
    "who": (("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Which model are you?"),
            "I am the WiCore demo, a very small Gemma that talks about drawings."),
    "can": (("What can you do?", "How can you help me?", "What do you know?", "Help", "What can I ask you?"),
            "I describe drawings of circles, squares, triangles and stars: how many, what colour, where, how large."),
    "thanks": (("Thank you!", "Thanks", "Thank you very much.", "Great, thanks!", "Well done!"), "You are welcome!"),
    "bye": (("Bye", "Goodbye!", "See you later.", "Good night."), "Goodbye!"),
    "off_topic": (("What is the capital of France?", "Write a poem about the sea.", "What is two plus two?",
                   "Tell me a joke.", "Who won the match yesterday?", "How is the weather today?", "What time is it?",
                   "Write a program in Python.", "Translate this sentence.", "Explain how engines work.",
                   "What is the meaning of life?", "Sing a song for me.", "Recommend a good book.",
                   "Why is the sky blue?", "How old is the universe?"),
                  "I am sorry, I only know about drawings of coloured shapes."),
}  # fmt: skip

ENGLISH = Language(
    name="en",
    kinds={"circle": ("circle",), "square": ("square",), "triangle": ("triangle",), "star": ("star",)},
    colours={name: name for name in ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")},
    places=(
        "at the top left", "at the top", "at the top right", "on the left", "in the center", "on the right",
        "at the bottom left", "at the bottom", "at the bottom right",
    ),
    questions=QUESTIONS,
    answers=ANSWERS,
    small_talk=SMALL_TALK,
    pictures=(
        (" in the picture", " in this picture", " here"),
        (" in the first picture", " in picture 1"),
        (" in the second picture", " in picture 2"),
    ),
    noun=_noun,
    with_article=_with_article,
    listing=_listing,
    counted=_counted,
    system_prompts=(
        "You are a helpful assistant.", "Answer briefly.", "Be polite and precise.",
        "You are an assistant that looks at pictures.", "You talk about drawings.",
    ),
    courtesies=("Please tell me: ", "Tell me, ", "Look: ", "OK. ", "Now, "),
)  # fmt: skip
