import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.util.stream.Collectors;

/** The HTTP client of the JDK as it is, which offers to upgrade to HTTP/2. Writes what it was answered, a line each. */
public class Http {
  private static final HttpClient CLIENT = HttpClient.newHttpClient();
  private static final String SCHEMA =
      "{\"type\":\"object\",\"properties\":{\"city\":{\"enum\":[\"Paris\",\"Tokyo\"]},\"size\":{\"type\":\"integer\","
          + "\"minimum\":0,\"maximum\":9}},\"required\":[\"city\",\"size\"],\"additionalProperties\":false}";

  private static HttpRequest post(String model, int maxTokens, String more) {
    String body =
        "{\"model\":\"" + model + "\",\"messages\":[{\"role\":\"user\",\"content\":\"Hé?\"}],\"temperature\":0,"
            + "\"max_tokens\":" + maxTokens + more + "}";
    return HttpRequest.newBuilder(URI.create(System.getenv("BASE_URL") + "/chat/completions"))
        .header("Content-Type", "application/json")
        .POST(HttpRequest.BodyPublishers.ofString(body))
        .build();
  }

  private static void say(HttpRequest request) throws Exception {
    HttpResponse<String> answer = CLIENT.send(request, HttpResponse.BodyHandlers.ofString());
    System.out.println(answer.statusCode() + " " + answer.body());
  }

  public static void main(String[] arguments) throws Exception {
    String model = arguments[0];
    say(post(model, 8, ""));
    HttpRequest streamed = post(model, 8, ",\"stream\":true,\"stream_options\":{\"include_usage\":true}");
    HttpResponse<java.util.stream.Stream<String>> lines = CLIENT.send(streamed, HttpResponse.BodyHandlers.ofLines());
    String chunks =
        lines.body().filter(line -> line.startsWith("data: {")).map(line -> line.substring(6)).collect(Collectors.joining(","));
    System.out.println(lines.statusCode() + " [" + chunks + "]");
    String function = "{\"type\":\"function\",\"function\":{\"name\":\"look_up\",\"parameters\":" + SCHEMA + "}}";
    say(post(model, 400, ",\"tools\":[" + function + "],\"tool_choice\":\"required\""));
    String form = "{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"place\",\"schema\":" + SCHEMA + "}}";
    say(post(model, 400, ",\"response_format\":" + form));
    say(post("nobody", 8, ""));
  }
}
