"""Made-up dialogues in LoCoMo's two shapes."""

import copy

KITES = {
    "speaker_a": "Ada",
    "speaker_b": "Bo",
    "session_1_date_time": "9:05 am on 1 May, 2020",
    "session_1": [
        {"speaker": "Ada", "dia_id": "D1:1", "text": "I bought a red kite yesterday."},
        {
            "speaker": "Bo",
            "dia_id": "D1:2",
            "text": "Here is\nmy dog.",
            "img_url": ["x"],
            "query": "dog",
            "blip_caption": "a photo of a {brown} dog",
        },
    ],
    "session_2_date_time": "8:00 pm on 3 May, 2020",
    "session_2": [{"speaker": "Bo", "dia_id": "D2:1", "text": "Did it fly?", "img_url": ["y"]}],
    "session_3_date_time": "8:30 pm on 3 May, 2020",  # a date without a session
    "session_10_date_time": "7:00 am on 9 June, 2020",
    "session_10": [{"speaker": "Ada", "dia_id": "D10:1", "text": "High above the lake."}],
    "session_1_summary": "Ada tells of a kite.",
    "events_session_1": {"Ada": [], "Bo": []},
    "qa": [
        {"question": "What did Ada buy?", "answer": "a red kite", "evidence": ["D1:1"], "category": 4},
        {"question": "In which year did Ada buy the kite?", "answer": 2020, "evidence": ["D1:1; D2:1"], "category": 2},
        {"question": "What colours and animals are named?", "answer": "red, dog", "evidence": [], "category": 1},
        {"question": "Does Ada like wind?", "answer": "Yes; she flies a kite", "evidence": ["D"], "category": 3},
        {"question": "What did Bo buy?", "adversarial_answer": "a red kite", "evidence": ["D1:1"], "category": 5},
        {"question": "Is the dog Ada's?", "answer": "No", "adversarial_answer": "Yes", "evidence": [], "category": 5},
    ],
}


def listed(flat: dict, name: str) -> dict:
    """The same dialogue as an item of the list shape."""
    flat = copy.deepcopy(flat)
    conversation = {key: value for key, value in flat.items() if key != "qa" and not key.startswith("events")}
    return {"sample_id": name, "qa": flat["qa"], "conversation": conversation, "event_summary": {}}


def long_dialogue(turns: int) -> dict:
    """Another one, of two sessions with `turns` turns each."""
    sessions = {}
    for session in (1, 2):
        sessions[f"session_{session}_date_time"] = f"{session} July, 2021"
        sessions[f"session_{session}"] = [
            {"speaker": ("Cy", "Di")[turn % 2], "text": f"This is number {turn}, {'so ' * (turn % 7)}it goes."}
            for turn in range(turns)
        ]
    questions = [
        {"question": "What goes?", "answer": "it", "category": 4},
        {"question": "Which number is last of all the many numbers?", "answer": turns - 1, "category": 1},
        {"question": "What stops?", "adversarial_answer": "it", "category": 5},
    ]
    return {"speaker_a": "Cy", "speaker_b": "Di", **sessions, "qa": questions}
