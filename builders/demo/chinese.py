"""Chinese: the demo world's words, question phrasings and answers."""

from __future__ import annotations

from builders.demo.language import Language


def _noun(colour: str | None, kind: str | None, plural: bool) -> str:
    word = kind or "图形"
    return f"{colour}的{word}" if colour else word


def _with_article(noun: str) -> str:
    return f"一个{noun}"


def _listing(things: list[tuple[str, str]]) -> str:
    return "，".join(f"{place}有一个{noun}" for noun, place in things)


def _counted(count: int, singular: str, plural: str) -> str:
    return f"{count}个{singular}"


QUESTIONS: dict[str, tuple[str, ...]] = {
    "describe": ("描述一下这张图。", "图中有什么？", "这张图里有什么？", "你看到了什么？", "图里画了什么？",
                 "这是什么？", "图中有哪些图形？", "请说说这张图的内容。", "列出图中的所有图形。", "请描述图片。"),
    "describe_nth": ("{pic}有什么？", "{pic}画了什么？", "{pic}有哪些图形？", "你在{pic}看到了什么？",
                     "描述一下{pic}有什么。"),
    "count": ("{pic}有几个{many}？", "{pic}有多少个{many}？", "数一数{pic}{many}。", "{pic}{many}有几个？"),
    "count_more": ("{many}呢？", "那{many}呢？", "那{many}有几个？"),
    "count_total": ("{pic}一共有几个图形？", "{pic}总共有多少个图形？", "{pic}一共有几个？"),
    "colour_of": ("{pic}{the}是什么颜色的？", "{pic}{the}是什么颜色？", "{pic}{the}什么颜色？",
                  "告诉我{pic}{the}的颜色。"),
    "and_the": ("{the}呢？", "那{the}呢？", "那么{the}呢？"),
    "colour_at": ("{pic}{at}的图形是什么颜色的？", "{pic}{at}的图形是什么颜色？", "{pic}{at}是什么颜色的图形？"),
    "shape_at": ("{pic}{at}是什么形状？", "{pic}{at}的图形是什么形状？", "{pic}{at}是哪种图形？"),
    "what_at": ("{pic}{at}有什么？", "{pic}{at}是什么？", "你看到{pic}{at}有什么？"),
    "and_at": ("{at}呢？", "那{at}呢？", "那么{at}呢？"),
    "shape_of": ("{pic}{c}的是什么形状？", "{pic}{c}的图形是什么形状？", "{pic}哪种图形是{c}的？"),
    "where": ("{pic}{the}在哪里？", "{pic}{the}在哪儿？", "{pic}{the}在什么位置？"),
    "what_colour": ("它是什么颜色的？", "它是什么颜色？", "是什么颜色的？"),
    "what_shape": ("它是什么形状？", "是什么形状的？", "它是哪种图形？"),
    "where_is_it": ("它在哪里？", "它在哪儿？", "在哪里？"),
    "what_else": ("{pic}还有什么？", "{pic}还有别的吗？", "{pic}还有其他图形吗？"),
    "largest": ("{pic}哪个图形最大？", "{pic}最大的图形是什么？", "{pic}最大的是哪个？"),
    "smallest": ("{pic}哪个图形最小？", "{pic}最小的图形是什么？", "{pic}最小的是哪个？"),
    "which_larger": ("{pic}{the}和{other}哪个更大？", "{pic}{the}和{other}哪个大？"),
    "which_smaller": ("{pic}{the}和{other}哪个更小？", "{pic}{the}和{other}哪个小？"),
    "is_left": ("{pic}{the}在{other}的左边吗？", "{pic}{the}是不是在{other}的左边？"),
    "is_right": ("{pic}{the}在{other}的右边吗？", "{pic}{the}是不是在{other}的右边？"),
    "is_above": ("{pic}{the}在{other}的上面吗？", "{pic}{the}是不是在{other}的上面？"),
    "is_below": ("{pic}{the}在{other}的下面吗？", "{pic}{the}是不是在{other}的下面？"),
    "is_larger": ("{pic}{the}比{other}大吗？", "{pic}{the}是不是比{other}大？"),
    "is_smaller": ("{pic}{the}比{other}小吗？", "{pic}{the}是不是比{other}小？"),
    "exist": ("{pic}有{the}吗？", "{pic}有没有{the}？", "{pic}有{a}吗？", "你看到{pic}有{the}吗？"),
    "and_exist": ("有{the}吗？", "那有没有{the}？"),
    "is_at": ("{pic}{the}在{at}吗？", "{pic}{the}是不是在{at}？"),
    "is_colour": ("{pic}{the}是{c}的吗？", "{pic}{the}是不是{c}的？"),
    "same_colour": ("{pic}{the}和{other}颜色一样吗？", "{pic}{the}和{other}的颜色相同吗？",
                    "{pic}{the}和{other}是同一种颜色吗？"),
    "more": ("{pic}{many}比{others}多吗？", "{pic}{many}是不是比{others}多？"),
    "which_more": ("哪张图的{many}更多？", "哪张图有更多的{many}？", "两张图中哪一张的{many}多？"),
    "both": ("两张图里都有{the}吗？", "两张图都有{the}吗？", "是不是两张图都有{the}？"),
    "sum": ("两张图里一共有几个{many}？", "两张图总共有多少个{many}？", "数一数两张图里的{many}。"),
}  # fmt: skip

ANSWERS: dict[str, str] = {
    "describe_one": "图中{list}。",
    "describe": "图中有{n}个图形：{list}。",
    "count": "有{counted}。",
    "count_one": "有{counted}。",
    "count_none": "没有{many}。",
    "absent": "图中没有{the}。",
    "empty": "{at}什么都没有。",
    "colour_of": "{the}是{c}的。",
    "it_is_colour": "是{c}的。",
    "it_is_shape": "是{the}。",
    "a_thing": "{A}。",
    "shape_of": "{c}的是{the}。",
    "where": "{the}在{at}。",
    "it_is_at": "在{at}。",
    "else": "还有：{list}。",
    "no_else": "没有别的了。",
    "largest": "最大的是{the}。",
    "smallest": "最小的是{the}。",
    "which_larger": "{the}更大。",
    "which_smaller": "{the}更小。",
    "yes_left": "是的，在左边。",
    "yes_right": "是的，在右边。",
    "yes_above": "是的，在上面。",
    "yes_below": "是的，在下面。",
    "yes_larger": "是的，它更大。",
    "yes_smaller": "是的，它更小。",
    "no_left": "不，在右边。",
    "no_right": "不，在左边。",
    "no_above": "不，在下面。",
    "no_below": "不，在上面。",
    "no_larger": "不，它更小。",
    "no_smaller": "不，它更大。",
    "exist": "有，有{counted}。",
    "exist_one": "有，有{counted}。",
    "exist_none": "没有{the}。",
    "yes_at": "是的，在{at}。",
    "no_at": "不，在{at}。",
    "yes_colour": "是的，是{c}的。",
    "no_colour": "不，是{c}的。",
    "same_colour": "是的，都是{c}的。",
    "other_colour": "不，{the}是{c}的，{other}是{d}的。",
    "more_yes": "是的，{many}更多：{counted}，{counted2}。",
    "more_no": "不，{many}不更多：{counted}，{counted2}。",
    "more_first": "第一张图的{many}更多：{n}比{m}。",
    "more_second": "第二张图的{many}更多：{m}比{n}。",
    "more_same": "两张图的{many}一样多：{n}个。",
    "both_yes": "是的，两张图都有{the}。",
    "both_first": "不，只有第一张图有{the}。",
    "both_second": "不，只有第二张图有{the}。",
    "both_none": "不，两张图都没有{the}。",
    "sum": "第一张图有{n}个，第二张图有{m}个，一共{total}个。",
    "no_picture": "请给我看一张图。",
}

SMALL_TALK: dict[str, tuple[tuple[str, ...], str]] = {
    "hello": (("你好", "你好！", "您好", "嗨", "早上好！", "晚上好。", "大家好"), "你好！给我看一张图，然后问我吧。"),
    "how_are_you": (("你好吗？", "你今天好吗？", "最近怎么样？"), "我很好，谢谢。需要我做什么？"),
    "who": (("你是谁？", "你叫什么名字？", "你是什么？", "介绍一下你自己。", "你是哪个模型？"),
            "我是WiCore演示模型，一个谈论图画的小Gemma。"),
    "can": (("你会什么？", "你能做什么？", "你可以帮我做什么？", "帮助", "我可以问你什么？"),
            "我会描述圆形、正方形、三角形和星形的图画：有几个、什么颜色、在哪里、多大。"),
    "thanks": (("谢谢！", "谢谢", "非常感谢。", "太好了，谢谢！", "做得好！"), "不客气！"),
    "bye": (("再见", "再见！", "回头见。", "晚安。"), "再见！"),
    "off_topic": (("法国的首都是哪里？", "写一首关于大海的诗。", "二加二等于几？", "讲个笑话。", "昨天谁赢了比赛？",
                   "今天天气怎么样？", "现在几点了？", "用Python写一个程序。", "翻译这句话。", "生命的意义是什么？",
                   "唱首歌吧。", "推荐一本好书。", "天空为什么是蓝色的？", "宇宙有多老？"),
                  "对不起，我只懂彩色图形的图画。"),
}  # fmt: skip

CHINESE = Language(
    name="zh",
    kinds={
        "circle": ("圆形", "圆", "圆圈"),
        "square": ("正方形", "方形", "方块"),
        "triangle": ("三角形",),
        "star": ("星形", "五角星", "星星"),
    },
    colours={
        "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色",
        "purple": "紫色", "orange": "橙色", "black": "黑色", "white": "白色",
    },
    places=("左上", "上方", "右上", "左边", "中间", "右边", "左下", "下方", "右下"),
    questions=QUESTIONS,
    answers=ANSWERS,
    small_talk=SMALL_TALK,
    pictures=(("图中", "图里", "这张图里"), ("第一张图里", "图1中"), ("第二张图里", "图2中")),
    noun=_noun,
    with_article=_with_article,
    listing=_listing,
    counted=_counted,
    system_prompts=("你是一个有用的助手。", "请简短回答。", "请礼貌而准确。", "你是一个看图的助手。"),
    courtesies=("请问", "请告诉我，", "请看：", "好的。", "那么，"),
)  # fmt: skip
